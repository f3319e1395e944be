"""What every HTTP face shares: problems, middleware, health."""
