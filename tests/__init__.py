"""The tests of qdsmirror."""

from hypothesis import HealthCheck, settings

# A busy machine is no failure: no example has to end by a deadline.
settings.register_profile("qdsmirror", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qdsmirror")
