"""Evaluation: preference metrics, win rates, studies, AlpacaEval and RewardBench, reports."""
