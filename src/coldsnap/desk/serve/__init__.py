"""The platform on this machine: worker protocol, public API, and `coldsnap serve`, which runs both."""
