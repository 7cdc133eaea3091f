{{
    config(
        materialized='incremental',
        incremental_strategy='merge',
        unique_key='order_id',
        on_schema_change='fail',
        partition_by={'field': 'created_date', 'data_type': 'timestamp', 'granularity': 'day'},
        cluster_by=['product_id', 'user_id'],
    )
}}

with

orders as (

    select * from {{ ref('stg_orders') }}

),

{% if is_incremental() %}

stored as (

    select
        order_id,
        change_xid,
        order_date
    from {{ this }}

),

-- No watermark: a transaction that commits late brings an older change_xid than the newest one stored.
new_or_changed as (

    select orders.*
    from orders
    left join stored on orders.order_id = stored.order_id
    where
        stored.order_id is null
        or stored.change_xid != orders.change_xid
        or stored.order_date != orders.order_date

),

{% else %}

new_or_changed as (

    select * from orders

),

{% endif %}

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
        rules_version,
        source,
        screened_at,
        ingested_at,
        change_xid
    from new_or_changed

)

select * from final
