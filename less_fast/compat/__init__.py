"""Stand-ins for other projects' commands and files; nothing else of less_fast imports them."""
