"""Settings of every test process and of those it starts."""

import os

# One thread: the models are tiny, and threads that wait for each other on a busy machine cost many times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
