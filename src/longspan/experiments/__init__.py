"""Experiments that use the library: reproductions of the papers' claims, and the two quickstarts.

`longspan reproduce`, `longspan quickstart` and `longspan quickstart-lm` run them. Only the command line imports this
package.
"""
