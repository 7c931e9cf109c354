"""The daemons as twistd plugins."""

from twisted.application.service import ServiceMaker

qdsdriver = ServiceMaker(
    "qdsmirror driver",
    "qdsmirror.daemons.driver",
    "The device driver: LDSUs as NBD exports, journaled in their writelogs.",
    "qdsdriver",
)
qdspmd = ServiceMaker(
    "qdsmirror primary mirror daemon",
    "qdsmirror.daemons.pmd",
    "The master primary mirror daemon: ships the writelogs to the secondary systems.",
    "qdspmd",
)
qdsrmd = ServiceMaker(
    "qdsmirror remote mirror daemon",
    "qdsmirror.daemons.rmd",
    "The master remote mirror daemon: commits what arrives to the mirror devices.",
    "qdsrmd",
)
qdsconsole = ServiceMaker(
    "qdsmirror console",
    "qdsmirror.daemons.console",
    "The console: metrics of this host's groups, for Prometheus.",
    "qdsconsole",
)
