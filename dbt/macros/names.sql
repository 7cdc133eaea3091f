{#- The dataset of a model: the marts have one of their own, everything else that dbt makes is in the core's. -#}
{%- macro generate_schema_name(custom_schema_name, node) -%}
    {%- if custom_schema_name == 'marts' -%}
        {{ env_var('FINPRO_BIGQUERY_MARTS_DATASET', env_var('FINPRO_BIGQUERY_DATASET', 'finpro') ~ '_marts') }}
    {%- else -%}
        {{ target.schema }}
    {%- endif -%}
{%- endmacro -%}

{#- The name of a model's table, or of the table that keeps the rows that break a test. -#}
{%- macro generate_alias_name(custom_alias_name=none, node=none) -%}
    {%- set name = custom_alias_name or node.name -%}
    {{ 'failed_' ~ name if node.resource_type == 'test' else name }}
{%- endmacro -%}
