"""The web application and the small server side it needs."""
