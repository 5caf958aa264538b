"""What is drawn at ``/``, in a process of its own, which knows the service through its feed and nothing else."""
