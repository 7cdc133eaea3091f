{#- The labels of a job, as batch/bigquery.py gives them to all others: the DAG, the run, the step, and here the model or test.
    `finpro transform` sets FINPRO_RUN_ID. -#}
{%- macro job_labels(node) -%}
    {{- tojson({
        'dag': env_var('AIRFLOW_CTX_DAG_ID', 'manual'),
        'run': env_var('FINPRO_RUN_ID', ''),
        'step': 'transform',
        'node': node.name if node else '',
    }) -}}
{%- endmacro -%}
