"""A small page on this machine to try models, cards, sizes and allowed quality, and see plan and picture change."""
