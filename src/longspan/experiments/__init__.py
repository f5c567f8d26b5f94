"""What uses the library and is not part of it: the papers' claims re-enacted, and the two quickstarts.

`longspan reproduce`, `longspan quickstart` and `longspan quickstart-lm` run them. Only the command line imports this
package.
"""
