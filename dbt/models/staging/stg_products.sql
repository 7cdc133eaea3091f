with

raw_products as (

    select * from {{ source('raw', 'raw_products') }}

),

final as (

    select
        product_id,
        product_name,
        category,
        sub_category,
        currency,
        price,
        cost,
        created_date,
        source,
        ingested_at,
        change_xid
    from raw_products

)

select * from final
