"""``python -m rotator.web FOLDER``: the page's process. Started by the service, ends with it."""

import sys

from rotator.web.page.run import main

main(sys.argv[1])
