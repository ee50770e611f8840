"""The front end: options, requests, models and endpoints."""
