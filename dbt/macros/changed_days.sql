{#- The UTC days of created_date whose orders have changed since the last build: [first, last] of each stretch of days; none is
    any day. `finpro transform` finds out, and says it by a variable of the environment that nothing asks for while the project
    is parsed: it is other days each time, and after another `--vars` dbt parses all of the project anew. -#}
{%- macro changed_days() -%}
    {%- do return(fromjson(env_var('FINPRO_CHANGED_DAYS', 'null')) if execute else none) -%}
{%- endmacro -%}

{#- Which rows of a table are of a day that has changed since the last build: true for all where any day may have. BigQuery
    reads only the partitions that constants allow, so the days are written out.
    `column` is a timestamp, or a date where `kind` says so. -#}
{%- macro is_of_a_changed_day(column, kind='timestamp') -%}
    {%- set days = changed_days() -%}
    {%- if days is none -%}
        true
    {%- elif not days -%}
        false
    {%- else -%}
        (
        {%- for first, last in days -%}
            {{ ' or ' if not loop.first }}{{ column }} between {{ kind }} '{{ first }}' and {{ kind }} '{{ last }}
            {{- ' 23:59:59.999999' if kind == 'timestamp' }}'
        {%- endfor -%}
        )
    {%- endif -%}
{%- endmacro -%}

{#- `insert_overwrite` takes a model's config, or a script, for the partitions to replace. Here they are the changed days:
    what the model gives takes their place in one statement, and a day that gives nothing any more is emptied. Rows without a
    day, which are of all days together (and_of_all_days), are always replaced. -#}
{%- macro bq_insert_overwrite_sql(
    tmp_relation, target_relation, sql, unique_key, partition_by, partitions, dest_columns, tmp_relation_exists, copy_partitions
) -%}
    {%- set source = 'select * from ' ~ tmp_relation if tmp_relation_exists else sql -%}
    {%- set day = 'DBT_INTERNAL_DEST.' ~ partition_by.field -%}
    {%- set replaced = '(' ~ day ~ ' is null or ' ~ is_of_a_changed_day(day, partition_by.data_type) ~ ')' -%}
    {{ get_insert_overwrite_merge_sql(target_relation, '(' ~ source ~ ')', dest_columns, [replaced]) }}
{%- endmacro -%}

{#- `where: changed_days` of a test: it looks at the days that are built anew, whose rows it has not seen yet. -#}
{%- macro get_where_subquery(relation) -%}
    {%- set where = config.get('where') -%}
    {%- if where == 'changed_days' -%}
        (select * from {{ relation }} where {{ is_of_a_changed_day('created_date') }}) as changed
    {%- else -%}
        {%- do return(default__get_where_subquery(relation)) -%}
    {%- endif -%}
{%- endmacro -%}
