"""Takes a place in a ring and holds it until it is killed: python hold.py DIRECTORY NETWORK NETWORKS SETTINGS"""

import json
import sys
import time

from filter_grafting.errors import GraftingError
from filter_grafting.exchange import Ring

ring = Ring(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
try:
    ring.join(resume=False)
    ring.agree(json.loads(sys.argv[4]))
except GraftingError as error:
    print(f"refused: {error}", flush=True)
    ring.leave("failed", str(error))
    sys.exit(1)
print("agreed", flush=True)
time.sleep(600)
