"""What a run needs before a cluster is booked: its programs, compiled for chips that are not here."""
