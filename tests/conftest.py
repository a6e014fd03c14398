"""Shared fixtures. One torch thread: several jobs may run beside the tests."""
