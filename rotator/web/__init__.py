"""The web page at ``/``: a door within the service, and behind it a process of its own that draws the page.

``door``, ``pipe``, ``room`` and ``feed`` run in the service and only check, copy bytes and answer with JSON. ``page``
runs in the other process and knows the service through ``feed`` alone: whatever happens there, the service's loop goes
on.
"""
