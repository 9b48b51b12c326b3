"""Makes footage with known truth, and puppets.

Footage: videos of talking people, drawn by program. Some have one known fault, some have unusual timing, coding or
containers, some are broken files. `make` writes them, and a table `truth.csv` that says what is true of each file.

Puppets: tiny drawn videos whose mouth follows the sound and whose arm follows the text (tasks.synthetic.puppets). They
are packed as shards to train on (tasks.synthetic.puppet_shards).
"""

from tasks.synthetic.make import catalogue, make
from tasks.synthetic.measure import measure_events
from tasks.synthetic.truth import Truth, read_table

__all__ = ["Truth", "catalogue", "make", "measure_events", "read_table"]
