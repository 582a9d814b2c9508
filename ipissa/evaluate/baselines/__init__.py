"""Other ways to steer, each with the same dial, measured beside an adapter in the same run."""
