"""A local page to try models, cards, sizes and allowed quality, and see the plan and its pictures."""
