"""Questions about a bare network: its sites, joins, head and ends, and what its dimensions mean."""
