"""The code of `composer-se compare`: does SE pay on a recipe?"""
