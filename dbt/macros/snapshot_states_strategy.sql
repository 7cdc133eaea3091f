{#- The strategy of the history: a state is new when a column of `check_cols` differs. It began when Postgres wrote the row,
    by `ingested_at`; where that has not moved since the state before (an UPDATE by hand, a row that was gone for a while, an
    older copy of the database), it began now, when it was first seen. So no two states of a key begin at the same time. -#}
{%- macro snapshot_states_strategy(node, snapshotted_rel, current_rel, model_config, target_exists) -%}
    {%- set strategy = snapshot_check_strategy(node, snapshotted_rel, current_rel, model_config, target_exists) -%}
    {%- if target_exists -%}
        {%- set key = config.get('unique_key') -%}
        {%- set seen -%}
            (
                select max(greatest(known.dbt_valid_from, coalesce(known.dbt_valid_to, known.dbt_valid_from)))
                from {{ this }} as known
                where known.{{ key }} = snapshot_query.{{ key }}
            )
        {%- endset -%}
        {%- set began -%}
            case
                when {{ seen }} is null or ingested_at > {{ seen }} then ingested_at
                else greatest({{ snapshot_get_time() }}, timestamp_add({{ seen }}, interval 1 microsecond))
            end
        {%- endset -%}
    {%- else -%}
        {%- set began = 'ingested_at' -%}
    {%- endif -%}
    {%- do strategy.update(updated_at=began, scd_id=snapshot_hash_arguments([config.get('unique_key'), began])) -%}
    {%- do return(strategy) -%}
{%- endmacro -%}
