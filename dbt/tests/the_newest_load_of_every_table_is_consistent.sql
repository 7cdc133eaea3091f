-- A table that was never reconciled (in the run that is asked for) breaks it as well.
with

newest as (

    select
        table_name,
        run_id,
        status
    from {{ source('raw', 'ingestion_monitoring') }}
    {% if var('run_id') %}
    where run_id = '{{ var("run_id") }}'
    {% endif %}
    qualify row_number() over (partition by table_name order by finished_at desc) = 1

)

select
    raw_table,
    newest.run_id,
    newest.status
from unnest(['raw_users', 'raw_products', 'raw_orders']) as raw_table
left join newest on raw_table = newest.table_name
where coalesce(newest.status, 'none') != 'Consistent'
