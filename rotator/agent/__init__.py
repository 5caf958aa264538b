"""The agent: a small process on each machine with GPUs, through which one service reaches what it cannot see itself."""
