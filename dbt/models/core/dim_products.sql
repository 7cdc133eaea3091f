with

products as (

    select * from {{ ref('stg_products') }}

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
        price - cost as unit_profit,
        created_date,
        source
    from products

)

select * from final
