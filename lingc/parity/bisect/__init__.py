"""Find the first step that computes something else, among steps that are fed the same values.

A difference travels: one wrong step moves every tensor after it, and a router that is moved a
little sends tokens elsewhere. So no step is fed what another side made wrong. Each is given the
values of the side that is believed, or of its own side, and only what it makes of them is compared.
What differs then differs by that step's own doing.
"""
