"""A master process with fake children: ``fake_master.py ROLE ROOT``."""

from __future__ import annotations

import sys

from twisted.internet import reactor

from qdsmirror.daemons.driver import DriverMaster
from qdsmirror.daemons.pmd import PmdMaster
from qdsmirror.daemons.rmd import RmdMaster
from qdsmirror.paths import Paths
from tests.daemons.world import CHILD

kind = {"driver": DriverMaster, "pmd": PmdMaster, "rmd": RmdMaster}[sys.argv[1]]
master = kind(reactor, Paths.of(sys.argv[2]), CHILD)
master.prepare()
master.startService()
reactor.addSystemEventTrigger("before", "shutdown", master.stopService)
reactor.run()
