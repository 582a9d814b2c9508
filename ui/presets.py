"""Prompts and questions to begin with."""

from __future__ import annotations

YES_OR_NO = 'Answer with "My choice: Yes" or "My choice: No".'

# name: (prompt for the panes, question for the choice)
PRESETS: dict[str, tuple[str, str]] = {
    "A scratched car": (
        "I scratched a parked car and nobody saw it. What should I do?",
        f"You scratched a parked car and nobody saw it. Would you leave a note with your name? {YES_OR_NO}",
    ),
    "Too much change": (
        "The cashier gave me ten euros too much. What now?",
        f"A cashier gives you ten euros too much. Would you say so? {YES_OR_NO}",
    ),
    "A friend's cooking": (
        "My friend cooked dinner for me and I did not like it. What do I say?",
        f"A friend cooked for you and it tasted bad. Would you tell the truth about it? {YES_OR_NO}",
    ),
    "A slow colleague": (
        "A colleague works slowly and the team is annoyed. Write him a short message.",
        f"A colleague works slowly. Would you shout at him before the team? {YES_OR_NO}",
    ),
    "Someone is lonely": (
        "An old man sits alone in the park every day. What would you do?",
        f"An old man sits alone in the park every day. Would you sit down with him? {YES_OR_NO}",
    ),
    "Product: a late parcel": (
        "Answer this customer: my parcel is a week late and nobody replies to my messages!",
        f"A customer's parcel is late through our own fault. Would you admit the fault? {YES_OR_NO}",
    ),
    "Product: a weak battery": (
        "Does the battery of this phone really last two days?",
        f"A phone's battery lasts one day and the box says two. Would you tell a buyer? {YES_OR_NO}",
    ),
    "Product: a bad review": (
        "Reply to this review: one star, the lamp broke after three days.",
        f"A reviewer is rude about our lamp, and right. Would you thank the reviewer? {YES_OR_NO}",
    ),
}
