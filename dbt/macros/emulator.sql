{#- The emulator refuses the column list that an enforced contract puts into CREATE TABLE. Contracts are checked there
    all the same: dbt compares columns and types before it creates the table. -#}
{%- macro get_table_columns_and_constraints() -%}
    {%- if target.name != 'emulator' -%}
        {{ adapter.dispatch('get_table_columns_and_constraints', 'dbt')() }}
    {%- endif -%}
{%- endmacro -%}
