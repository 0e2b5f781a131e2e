"""What the DAGs share: the trigger form, the runner and the candidate asset. No work at import time."""
