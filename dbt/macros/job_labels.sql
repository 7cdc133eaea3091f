{#- The labels of a job, as batch/bigquery.py gives them to all others: the DAG, the run, the step, and here the model or test. -#}
{%- macro job_labels(node) -%}
    {{- tojson({
        'dag': env_var('AIRFLOW_CTX_DAG_ID', 'manual'),
        'run': var('run_id', none) or '',
        'step': 'transform',
        'node': node.name if node else '',
    }) -}}
{%- endmacro -%}
