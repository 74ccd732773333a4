"""The methods: `table` has them by name, the other modules have what they are made of."""
