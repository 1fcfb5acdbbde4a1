"""The protocol of a publisher, without I/O: `session` its life, `flights` what is on its way."""
