"""One file per tab: its layout, and what answers its events."""
