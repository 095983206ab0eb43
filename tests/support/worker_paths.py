"""A site of `path_sites` for a server: the one that the environment names."""

import os

from tests.support import path_sites

app = path_sites.built(os.environ["PATH_SITE"])
