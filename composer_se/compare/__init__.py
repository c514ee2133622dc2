"""The instrument behind `composer-se compare`: does SE pay on a recipe?"""
