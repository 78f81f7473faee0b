"""Where adapters come from: folders, and what is fetched into a cache of verified folders."""
