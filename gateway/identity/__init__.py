"""Who somebody is: accounts, logins, sessions, tokens, launch tickets."""
