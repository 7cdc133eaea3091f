"""`finpro status`: what each part is asked, and how the answers are shown.

Each check has its own time to answer.
"""
