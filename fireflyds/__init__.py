"""fireflyds: from an open base model to a model that is good at Chinese."""

__version__ = "0.2.0"
