"""What all tests share: property tests print how to replay a failure. Helpers: `tests.manual_cluster`."""

from hypothesis import HealthCheck, settings

settings.register_profile("cxlmq", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cxlmq")
