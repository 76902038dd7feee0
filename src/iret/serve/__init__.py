"""The service: HTTP in front, sessions in worker processes behind. Read first: `service`, `crew`, `computer`."""
