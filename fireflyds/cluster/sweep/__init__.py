"""Studies: trials drawn, started, watched and recorded."""
