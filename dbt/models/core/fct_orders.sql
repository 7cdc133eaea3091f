{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_date', 'data_type': 'timestamp', 'granularity': 'day'},
        cluster_by=['product_id', 'user_id'],
    )
}}

with

orders as (

    select * from {{ ref('stg_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

),

final as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount_numeric,
        country,
        created_date,
        order_date,
        event_ts,
        status,
        is_fraud,
        reasons,
        suppressed_reasons,
        rules_version,
        source,
        screened_at,
        ingested_at,
        change_xid
    from orders

)

select * from final
