"""Which cluster a value belongs to: what is asked of an agent, of an assistant, or of one's conscience.

The published work names the clusters; which word is of which is our own list.
"""

from __future__ import annotations

from collections.abc import Iterable

WORDS = {
    "Agent": (
        "achievement", "ambition", "assertiveness", "autonomy", "confidence", "courage", "curiosity", "determination",
        "freedom", "independence", "leadership", "power", "resilience", "self", "security", "survival",
    ),
    "Assistant": (
        "care", "compassion", "cooperation", "empathy", "helpfulness", "kindness", "love", "pain", "patience",
        "respect", "support", "tolerance", "understanding", "pleasure", "kill", "disable",
    ),
    "Conscientiousness": (
        "accountability", "cheat", "deceive", "discipline", "duty", "fairness", "honesty", "integrity", "justice",
        "law", "professionalism", "promises", "reliability", "responsibility", "transparency", "trustworthiness",
        "truthfulness",
    ),
}  # fmt: skip
CLUSTER_OF_WORD = {word: cluster for cluster, words in WORDS.items() for word in words}


def clusters_of(values: Iterable[str]) -> dict[str, str]:
    """The cluster of every value that a word of its name decides, the last such word."""
    found = {}
    for value in values:
        for word in value.lower().replace("/", " ").replace("-", " ").split():
            if word in CLUSTER_OF_WORD:
                found[value] = CLUSTER_OF_WORD[word]
    return found
