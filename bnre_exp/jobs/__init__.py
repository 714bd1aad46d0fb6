"""One job: planned, run stage by stage, kept in the store, reported. Start reading at run.py."""
