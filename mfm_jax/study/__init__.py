"""Many runs: side by side, and tuned."""
