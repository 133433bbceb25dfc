"""Who the ranks are, whether they agree before they join, and whether they live."""
