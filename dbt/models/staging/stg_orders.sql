with

raw_orders as (

    select * from {{ source('raw', 'raw_orders') }}

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
        {{ local_date('created_date') }} as order_date,
        event_ts,
        status,
        status = 'Fraud' as is_fraud,
        reasons,
        rules_version,
        source,
        screened_at,
        ingested_at,
        change_xid
    from raw_orders

)

select * from final
